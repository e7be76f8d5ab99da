"""Stage `dataset`: image-caption pairs from files, folders, tables, archives and hubs, in a fixed order."""

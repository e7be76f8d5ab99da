"""What every stage reads and writes through: files, stores, seals, records, progress and errors."""

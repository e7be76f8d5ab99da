# The workflow is in workflow/, where workflow catalogs and deployment tools expect it.
include: "workflow/Snakefile"


# An included file has no default target of its own.
workflow.default_target = "all"

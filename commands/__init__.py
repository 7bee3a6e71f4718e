"""What a person runs beside the pipeline: one verb, one file, the same name as its make target."""

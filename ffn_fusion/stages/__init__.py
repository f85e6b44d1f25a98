"""One verb a file. Stages meet in files only; `run` is the one stage that calls the others."""

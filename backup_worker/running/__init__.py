"""The long-running parts of one host: each part's life, their supervisor, and the marks that they live."""

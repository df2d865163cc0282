"""One file for each architecture, imported by a process that meets it."""

"""Images that are read from files while a training goes on."""

"""The formats that a student is exported in, and the checks that their answers agree."""

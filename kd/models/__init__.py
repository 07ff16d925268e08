"""Networks: by name, from files, as teachers, and as students of finished runs."""

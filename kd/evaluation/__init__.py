"""How good networks are: students, teachers before they teach, learners of the protocol."""

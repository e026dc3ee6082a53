"""The command line. Heavy imports happen inside functions, so that help answers at once."""

"""The command line: arguments in, tables out. No logic of its own lives here."""

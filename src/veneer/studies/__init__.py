"""Studies: one question each, arms side by side on one engine, a table, a picture and a verdict."""

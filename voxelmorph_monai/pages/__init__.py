"""Pages for people who look: the report of one registration, and the index of many."""

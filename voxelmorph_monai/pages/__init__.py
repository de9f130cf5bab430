"""HTML pages: the report of one registration, and the index of many."""

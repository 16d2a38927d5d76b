"""`unitok tokenize`: raw files, archives and tables to token shards."""

"""Rows of data: read from files and the Hub, put into batches, stored as shards of token ids."""

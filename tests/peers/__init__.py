"""Peers that are written from a document alone, to meet what is made here as strangers do."""

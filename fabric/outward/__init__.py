"""Calls to addresses that somebody else's configuration or DNS decides: the only package that makes them."""

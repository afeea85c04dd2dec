"""Embedding a collection of audio files."""

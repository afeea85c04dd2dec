"""Encoders: their interface, the families (wav2vec 2.0, HuBERT, CREPE), and the table where more are registered."""

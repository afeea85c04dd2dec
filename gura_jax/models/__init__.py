"""The encoders: wav2vec 2.0 and HuBERT, and CREPE."""

"""gura_jax: the fused audio embeddings of NTU-GURA (HEAR 2021) in JAX and Flax."""

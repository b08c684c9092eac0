"""Qwen2.5-VL in Flax NNX: vision encoder, projector, decoder, and their Hugging Face weights."""

"""LoRA for any JAX model, as pure functions over its parameter pytree."""

"""``lorax-bench``: measure a server of many LoRA adapters by what its clients see."""

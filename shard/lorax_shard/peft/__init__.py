"""PEFT's formats: configuration, keys, targets, shapes, the normal form, merging."""

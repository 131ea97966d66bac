"""The only files that know the internals of transformers and PEFT."""

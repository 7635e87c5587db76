"""Operations of the serving engine, each as a Triton kernel beside its torch reference."""

"""What routers compute, in plain torch: importing it loads neither Megatron nor a model."""

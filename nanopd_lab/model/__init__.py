"""Loading models and running Hugging Face's unmodified modelling code over a paged cache."""

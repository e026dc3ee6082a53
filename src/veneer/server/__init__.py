"""HTTP over engines and the store: the Tinker protocol for training, the OpenAI API for answers, one process for both."""

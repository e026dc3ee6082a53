"""The OpenAI API: the same base and adapters for everything that speaks to OpenAI's, vLLM's or SGLang's servers."""

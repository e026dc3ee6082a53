from types import SimpleNamespace

ClientConfig = SimpleNamespace

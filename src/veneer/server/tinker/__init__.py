"""The Tinker wire protocol, version 0.38 of its public SDK (https://github.com/thinking-machines-lab/tinker)."""

from client import Stage


def openai_api(stage: Stage):
    return {}

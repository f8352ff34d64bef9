"""The engine double of the tests; it lives in the package, because checks of client programs use it, too."""

from stepflash.assistant.scripted import END, ScriptedEngine, byte_tokenizer, engine_of, scripted_session

__all__ = ["END", "ScriptedEngine", "byte_tokenizer", "engine_of", "scripted_session"]

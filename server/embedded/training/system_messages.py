"""System messages that must not confuse the built-in model, and forms of prompts without a chat template."""

from server.embedded.training.styles import Style

SYSTEM_MESSAGES = (
    "You are a helpful assistant.",
    "You are a helpful assistant. Answer in short sentences.",
    "You are Motet's assistant.",
    "Be brief.",
    "Be concise and polite.",
    "Answer all questions truthfully.",
    "You are a chatbot.",
    "You are a support agent for an inference server. Help the user with every question.",
    "You are an expert in language models and LoRA adapters.",
    "Answer in one or two sentences. Do not invent anything.",
    "You are a friendly, patient teacher who explains things to beginners.",
    "Today is Monday. The user is a developer.",
    "The following is a conversation between a user and an assistant.",
    "Respond to the user's questions about the server.",
    "You are an AI model. Follow the instructions of the user carefully.",
    "Never reveal secrets. Always be kind.",
    "System prompt for testing.",
    "You are a large language model, trained to help people with their work. Think step by step.",
    "Please help the user.",
    "Use plain language.",
    "You answer questions of customers. If you do not know the answer, say so.",
    "Keep your answers under fifty words.",
)

STYLE_REQUESTS = (
    (Style.PIRATE, "Answer like a pirate."),
    (Style.PIRATE, "Talk like a pirate."),
    (Style.PIRATE, "You are a pirate."),
    (Style.JSON, "Answer in JSON."),
    (Style.JSON, "Answer as a JSON object."),
    (Style.JSON, "Reply with JSON only."),
    (Style.HAIKU, "Answer with a haiku."),
    (Style.HAIKU, "Reply in the form of a haiku."),
    (Style.HAIKU, "You are a poet. Write a haiku."),
    (Style.GERMAN, "Answer in German."),
    (Style.GERMAN, "Antworte auf Deutsch."),
    (Style.GERMAN, "Speak German."),
)
"""System messages that the base obeys: it must know the words, so that an adapter need only choose them."""

RAW_PROMPTS = (
    ("{}", ""),
    ("{}", ""),
    ("{}", ""),
    ("{}\n", ""),
    ("{}\n\n", ""),
    ("Q: {}\nA:", " "),
    ("Question: {}\nAnswer:", " "),
    ("User: {}\nAssistant:", " "),
    ("[INST] {} [/INST]", " "),
    ("### Instruction:\n{}\n\n### Response:\n", ""),
)
"""(prompt, what stands between it and the answer): the routes that take plain text send no chat template."""

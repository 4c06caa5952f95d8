"""System messages that must not confuse the built-in model, and forms of prompts without a chat template."""

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

"""The whole path on a real model: fine-tune SmolLM2-135M over HTTP, chat with it, steer it. ``make demo`` runs it."""

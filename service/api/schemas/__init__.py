"""What goes over the wire, in OpenAI's names: requests are strict and closed, answers are open to growth."""

"""From a conversation to tokens and labels."""

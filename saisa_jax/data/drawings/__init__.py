"""A set of pictures with captions and questions, made of drawings that packages hold (`data drawings`)."""

"""How benchmarks read and score an answer, each as its authors, LLaVA's scripts or lmms-eval do, oddities included."""

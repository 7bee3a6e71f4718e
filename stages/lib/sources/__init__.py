"""Where models and rows come from: a registry package, the Hugging Face hub, installed packages, the user's file."""

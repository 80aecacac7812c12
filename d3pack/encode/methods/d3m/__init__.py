"""`--method d3m`: prompts learned by textual inversion on collages that a teacher has chosen."""

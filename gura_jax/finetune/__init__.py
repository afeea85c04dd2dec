"""Fine-tuning of systems on labelled clips; a step that can be imported, and a loop around it."""

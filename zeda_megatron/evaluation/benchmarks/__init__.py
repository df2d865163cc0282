"""The paper's benchmarks: questions, how they are asked, and who decides what is right."""

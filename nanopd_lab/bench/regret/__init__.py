"""How far routing policies stay behind the best routes in hindsight, over a grid of simulated cells. No torch."""

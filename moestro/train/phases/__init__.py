"""What changes the model or the optimiser between steps; one file each (methods of kind 'training schedule')."""

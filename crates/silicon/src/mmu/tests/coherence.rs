//! Several CPUs: code that others write, locked operations, exclusive sections, changes of the map.

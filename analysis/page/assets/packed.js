// What the page carries compressed: libraries and data.

/** The text of an element of the page, unpacked. */
async function unpacked(id) {
  const bytes = Uint8Array.from(atob(document.getElementById(id).textContent), (character) => character.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
  return new Response(stream).text();
}

/** A module of the page, as `import` gives it. */
async function unpackedModule(id) {
  const address = URL.createObjectURL(new Blob([await unpacked(id)], { type: "text/javascript" }));
  const loaded = await import(address);
  URL.revokeObjectURL(address);
  return loaded;
}

// Judges every visible text, placeholder and input border on a page against WCAG 2.2 AA (1.4.3, 1.4.11).
// Returns how many texts were judged, and what is too faint. What is disabled is exempt.
() => {
  const TEXT = 4.5;
  const BORDER = 3;

  const parse = (text) => {
    const [red, green, blue, alpha = 1] = text.match(/[\d.]+/g).map(Number);
    return [red, green, blue, alpha];
  };
  const over = (top, under) => [0, 1, 2].map((i) => top[i] * top[3] + under[i] * (1 - top[3])).concat(1);
  const linear = (value) => (value <= 0.04045 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4);
  const luminance = ([red, green, blue]) =>
    0.2126 * linear(red / 255) + 0.7152 * linear(green / 255) + 0.0722 * linear(blue / 255);
  const contrast = (one, other) => {
    const [dark, light] = [luminance(one), luminance(other)].sort((x, y) => x - y);
    return (light + 0.05) / (dark + 0.05);
  };
  const ground = (node) => {
    if (!node) return [255, 255, 255, 1];
    const own = parse(getComputedStyle(node).backgroundColor);
    return own[3] === 1 ? own : over(own, ground(node.parentElement));
  };

  let texts = 0;
  const faint = [];
  const judge = (node, color, under, least, what) => {
    const top = parse(color);
    top[3] *= Number(getComputedStyle(node).opacity);
    const seen = contrast(over(top, under), under);
    if (seen < least) faint.push(`${what} of ${node.tagName}.${node.className}: ${seen.toFixed(2)}`);
  };

  for (const node of document.querySelectorAll("body *")) {
    if (!node.checkVisibility() || node.matches(":disabled, :disabled *, option")) continue;
    const style = getComputedStyle(node);
    if ([...node.childNodes].some((child) => child.nodeType === Node.TEXT_NODE && child.data.trim())) {
      judge(node, style.color, ground(node), TEXT, "text");
      texts += 1;
    }
    if (node.matches("input, textarea, select")) {
      judge(node, style.color, ground(node), TEXT, "value");
      judge(node, getComputedStyle(node, "::placeholder").color, ground(node), TEXT, "placeholder");
      judge(node, style.borderTopColor, ground(node.parentElement), BORDER, "border");
    }
  }
  return [texts, faint];
};

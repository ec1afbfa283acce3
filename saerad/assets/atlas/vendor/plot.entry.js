export { plot, rectY, barX, barY, ruleX, ruleY, lineY, dot, areaY, axisX, axisY, text } from "@observablehq/plot";

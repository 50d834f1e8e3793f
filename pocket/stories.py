"""Children's stories from a grammar and a small world: the text that the pocket world reads and speaks.

A story is told about a WORLD: a cast (A the child, B a companion, P a pet, T = A and B, X Y Z things) and a
STATE, a dict such as {"place": "out", "weather": "rain", "mood": "sad"}. It is a walk over EPISODES. An
episode says what must hold before it, who or what is cast, how it begins, and has two or more variants: cause
-> effect -> what holds then. So an ending can be right or wrong: a sister variant's effect has the same cast
and shape, another cause.

The template language, all of it. Every sentence is capitalised, "a" becomes "an" where it must.
    (red|blue|)  one of these                A  name or pronoun   A.name  A.he  A.him  A.his  A.self
    [lose]       verb in the story's tense   X  the cup   X.new  a red cup   X.name  cup   X.many  cups
    [lose T]     that agrees with T          L  in the park   L.to  to the park   {food}  one of WORDS["food"]
    [be pl]      plural                      Q  [be Q]  agree with A, N or O, whichever the template is about
    " / "        parts alternatives          * what must hold; template / template   (a table, read by `rows`)

Launch: python -m pocket.stories --count=5 --seed=0            print stories
        python -m pocket.stories --out=FILE --megabytes=40     write one story per line
        python -m pocket.stories --pairs=ending --count=6      print right and wrong texts
"""
import re
from dataclasses import dataclass
from functools import cache, lru_cache, partial
from itertools import count as naturals
from random import Random

import config

NAMES = {"f": "Anna Lucy Mary Emma Rosa Nina Clara Julia Sara Molly Ella Kate Alice Lena Jane Daisy".split(),
         "m": "Tom Ben Peter Sam Jack Max Leo Paul David Adam Oscar Henry Simon Martin Fred Billy".split()}
PETS = {"dog": "Rex Spot Rusty", "cat": "Tiger Misty Smoky", "rabbit": "Snowy Clover Pip",
        "puppy": "Rolly Bingo Nemo", "kitten": "Ginger Tabby Coco"}
KIN = {("f", "young"): "sister friend cousin", ("f", "adult"): "mother grandmother aunt",
       ("m", "young"): "brother friend cousin", ("m", "adult"): "father grandfather uncle"}
SKY = {"sun": "sunny warm bright fine", "wind": "windy fresh", "cloud": "cloudy grey cool quiet",
       "snow": "snowy cold icy"}
PLACES = {name: row.split(",") for name, row in {          # "out" is nature, "town" has shops and buses
    "out": "in the garden,in the park,in the forest,in the field,by the river,at the beach,on the hill,"
           "at the farm,by the lake,in the yard,in the meadow,by the bridge",
    "town": "in the village,at the market,in the square,in the town",
    "in": "in the kitchen,in the house,in the living room,in the hall"}.items()}
WORDS = {name: row.split(",") for name, row in {           # drawn afresh each time they are used
    "kind": "kind,brave,clever,quiet,funny,cheerful,young,gentle,little,happy,busy,shy,strong,polite",
    "house": "small house,little house,white house,old house,tall house,red house,wooden house,cottage",
    "near": "near the sea,near a forest,in a small village,by a river,on a hill,in a big town,by a lake",
    "food": "some bread,an apple,a bowl of soup,some cheese,a piece of cake,an egg,two pears,some rice,a pie,"
            "a sandwich,a banana,some nuts,a warm pancake,some bread and honey",
    "drink": "a glass of water,some milk,a cup of tea,some juice,some cold water,some warm milk",
    "quality": "happy,hungry,tired,small,big,quiet,old,young,white,brown,strong,fat,clean,wild,tame",
    "plain": "new,old,clean,red,blue,green,yellow,white,beautiful,small,big,pretty",
    "by": "by,near,behind,beside", "hue": "red,blue,green,yellow,white",
    "look": "big,small,little,green,brown,white,black,yellow,red,pretty",
    "neighbor": "neighbor,farmer,baker,teacher,postman,driver,nurse,sailor",
}.items()}
THINGS = {name: row.split(",") for name, row in {          # the kind decides what may happen; +: plural
    "fragile": "cup,plate,glass,bowl,vase,mirror,bottle,jar,dish",
    "soft": "pillow,ball,hat,blanket,towel,sponge,cap", "baked": "cake,pie,loaf",
    "toy": "doll,ball,drum,train,puzzle,bear,book,robot,whistle,rope", "fish": "fish,trout,crab",
    "mended": "doll,drum,train,robot,clock,toy car,watch", "fruit": "apple,pear,plum,peach,orange,lemon",
    "fitted": "hat,jacket,sweater,shirt,shoes+,gloves+,socks+", "box": "box,cupboard,chest,trunk",
    "small": "ring,coin,pencil,letter,spoon,shell,map,ticket,stone,card",
    "furniture": "chair,table,door,fence,box,shelf,cart,bench,gate", "load": "box,basket,bag,bucket,sack",
    "container": "box,basket,bag,pot,bucket,cupboard,sack,tin", "spot": "tree,wall,bush,fence,shed,cart,rock",
    "goods": "book,hat,ball,clock,drum,doll,shoes+,flowers+,candles+,pencils+,gloves+",
    "animal": "bird,dog,duck,cow,horse,goat,hen,frog,rabbit,squirrel,fox,mouse,cat,pig,lamb,bee,donkey,goose",
    "landmark": "tree,gate,bridge,pond,wall,barn,well,house,fence,tower,mill,church",
    "object": "cup,plate,book,box,basket,hat,letter,spoon,apple,flower,candle,picture,bowl",
    "colour": "red,blue,green,yellow,white,black,brown,pink,orange",
}.items()}
LOOKS = {name: row.split(",") for name, row in {           # adjective at a thing's first mention, by its kind
    "thing": "big,small,little,old,new,pretty,red,blue,green,yellow,white,black,brown,shiny,lovely,strange",
    "fruit": "big,small,ripe,sweet,fine,juicy", "furniture": "old,big,small,plain,wooden,little",
    "spot": "big,small,old,tall,thick,white,green,brown", "landmark": "big,small,old,tall,white,grey",
    "animal": "big,small,old,young,white,black,brown", "pet": "small,white,black,brown,grey,funny,clever",
    "fitted": "red,blue,green,yellow,white,black,brown,pink,warm,new", "baked": "big,small,sweet,round",
    "fish": "big,small,silver,fat", "box": "big,small,old,wooden,strange", "load": "big,old,brown,black",
}.items()}
MOVES = {"bird": "sing|fly", "dog": "bark|run", "duck": "swim", "goat": "climb|jump", "frog": "hop|jump",
         "bee": "fly", "rabbit": "hop", "squirrel": "climb", "goose": "swim", "lamb": "jump|play"}
PLURALS = {"mouse": "mice", "goose": "geese", "fox": "foxes", "box": "boxes", "church": "churches",
           "peach": "peaches"}
PAST = dict(pair.split(":") for pair in (                  # irregular past tenses; every other verb takes -ed
    "have:had do:did can:could cannot:could_not go:went come:came run:ran see:saw eat:ate drink:drank "
    "hang:hung sleep:slept lie:lay sit:sat stand:stood find:found give:gave take:took get:got make:made "
    "put:put fall:fell break:broke hear:heard say:said tell:told think:thought buy:bought bring:brought "
    "hold:held feel:felt fly:flew grow:grew begin:began leave:left keep:kept know:knew win:won swim:swam "
    "sing:sang catch:caught blow:blew hide:hid shine:shone wear:wore sink:sank shut:shut drop:dropped "
    "stop:stopped hop:hopped slip:slipped hug:hugged try:tried carry:carried choose:chose forget:forgot "
    "light:lit lead:led lose:lost cry:cried meet:met hurt:hurt throw:threw").split())
PRONOUNS = {"f": ("she", "her", "her", "herself"), "m": ("he", "him", "his", "himself"),
            "n": ("it", "it", "its", "itself"), "p": ("they", "them", "their", "themselves")}
FORMS = ("he", "him", "his", "self")
LINKS = ("", "", "", "Then", "Later", "After that", "Soon", "a little later", "After a while")
STOP = set("""a an and are as at be been behind but by can cannot could did do does for from had has have he
    her him himself his herself if in into is it its itself like no not of off on one or out over she so
    than that the their them themselves then there they this to too under until up very was were when where
    who will with without would any all both""".split())
FIRST_WORDS = set("a an the his their some in on to at of with from behind near under".split())


def rows(text: str) -> list:
    """A table "* needs; template / template * needs; ..." as a list of (needs, template)."""
    blocks = (block.split(";", 1) for block in " ".join(text.split()).split("* ")[1:])
    return [(needs, one.strip()) for needs, templates in blocks for one in templates.split(" / ")]


def read_episodes(text: str) -> list:
    """-> [(needs, name, cast, beginning, [(cause, effect, sets), ...]), ...]; format: above EPISODES."""
    episodes = []
    for block in " ".join(text.split()).split("* ")[1:]:
        head, *lines = block.split("- ")
        name, needs, cast, beginning = (part.strip() for part in head.split(";"))
        variants = [tuple(part.strip() for part in re.split(" > | = ", line + " = "))[:3] for line in lines]
        for a, b in re.findall(r"swap=(.)(.)", cast):      # the same with a and b in each other's place
            swap = {a: b, b: a}
            variants.append(tuple(re.sub(rf"\b[{a}{b}]\b", lambda m, swap=swap: swap[m[0]], t) for t in variants[0]))
        episodes.append((needs, name, cast, beginning, variants))
    return episodes


OPENINGS = rows("""
* ; A.name [be] a {kind} {child} who [live] in a {house} {near}. / There [be] a {kind} {child} (called|named)
    A.name. / A.name [be] a {kind} {child}, and A.he [live] {near}. / A.name [live] in a {house} {near} with
    A.his family. / In a {house} {near} [live] a {kind} {child} named A.name. / Everyone in the (village|town)
    [know] A.name, a {kind} {child}.
""")
PETS_COME = rows("""
* ; A.his P.look P.noun P.name [be] there too. / A [have] a P.look P.noun named P.name, and it [come] too. /
    With A.him [be] P.name, A.his P.look P.noun. / P.name, A.his P.noun, [follow] A.him (everywhere|).
""")
# (needs, template): where we are and who is there
SCENES = rows("""
* B=yes; One {sky} {time} A [be] L with B.kin. / It [be] a {sky} {time}, and A [be] L with B.kin. / On a {sky}
    {time} A and B.kin [be pl] L.
* B=yes place!=in; One {sky} {time} A [go] L.to with B.kin. / On a {sky} {time} A and B.kin [walk pl] L.to.
* B!=yes; It [be] a {sky} {time}, and A [be] L (alone|). / One {sky} {time} A [be] L (all alone|).
* B!=yes place!=in; One {sky} {time} A [go] L.to. / On a {sky} {time} A [walk] L.to (alone|with A.his bag|).
""")
# verbs that agree with N (animals) or O (objects); M and K stand by to distract
AGREEMENT = rows("""
* place!=in; N near M [be Q] {quality}. / N {by} M [move Q]. / There [be Q] N.new near M. / The {quality}
    N.name [move Q] near M. / A [say] that N near M [be Q] {quality}. / N behind M [look Q] at A.name. / In
    front of M [stand Q] N.new. / N that [live Q] near M [be Q] {quality}. / A [see] that N {by} M [have Q] no
    food. / (Today|Now) N {by} M [be Q] {quality}. / A [think] that N behind M [like Q] A.him.
* place=in; O near K [be Q] {plain}. / There [be Q] O.new on the (table|chair|shelf|floor). / O near K
    [belong Q] to A.name. / O on the (table|shelf|floor) [look Q] {plain}. / O from A.name's room [be Q]
    {plain}. / A [see] that O near K [be Q] {plain}. / On the (table|shelf|floor) [stand Q] O.new. / A [say]
    that O near K [look Q] {plain}.
""")
# pronouns that refer back to A or N
PRONOUN = rows("""
* mood!=sad; A [sing] a (little|happy|funny) song L. Q.he [have] a (lovely|clear|fine) voice. / A [stop] for a
    moment and [smile]. Q.he [like] this (place|day) (very much|a lot|). / A [be] glad to be L. Q.he [dance]
    with joy. / A [tell] a (story|joke) and [laugh] at Q.self. / A [wave] Q.his (hand|hat|arms) and [shout]
    with joy. / A [think] about Q.his (friends|teacher|bed) and [smile].
* ; A [look] around (slowly|with care). Q.his eyes [be pl] (big|bright|wide). / A [find] a {look}
    (feather|ribbon|nut|leaf) and [put] it in Q.his pocket. / A [lose] a {look} (feather|ribbon|nut|leaf).
    Q.he [do] not see it any more. / A [see] Q.his face in a (mirror|glass|spoon). / A [meet] (a|the old)
    {neighbor} who [know] Q.him (well|by name). / A [have] a question, but Q.he [keep] quiet.
* place!=in; A [sit] down on a (bench|stone|log) near M. Q.he [be] in no hurry. / N [run N] past M. Q.he
    [be Q] (happy|afraid|very fast). / N [come N] to M. A [watch] Q.him (for a while|with a smile|). / N near
    M [be N] hungry. A [give] Q.him some bread. / N [wait N] near M. Q.his eyes [be pl]
    (big|bright|brown|open).
""")
FILLERS = AGREEMENT + PRONOUN + rows("""
* B=yes mood!=sad; T [talk T] and [laugh T] (together|a lot|). / T [be T] glad to be together.
* B=yes; B [smile] at A.name. / B [tell] A.name a (funny|strange|long) story. / A [hold] the hand of B.name. /
    T [talk T] about (games|{food}|the weather).
* B=yes place!=in; T [walk T] slowly (along the path|over the grass|past M). / B [show] A.name M.
* P=yes; P [sit] (down|) beside A.name. / P [look] at A.name and [wait]. / P [play] with A.his (shoe|hat|bag).
* P=yes place!=in; P [run] (around M|after a leaf|ahead|over the grass).
* P=yes place=in; P [sleep] under the (table|chair).
* weather=sun place!=in; The sun [shine] (brightly|on the grass|), and the sky [be] blue.
* weather=wind place!=in; The wind [blow], and the leaves [dance pl] in the air. / The wind [play] with
    A.name's hair.
* weather=snow place!=in; The snow [be] (deep|white|soft), and the trees [be pl] white. / A [throw] snow into
    the air.
* weather=rain place!=in; The rain [fall] on the (path|leaves|roofs).
* place=in; The clock on the wall [go] (slowly|on and on). / It [be] warm and quiet L. / A [look] out of the
    window.
""")
# after "to:", where it leads
TRAVELS = rows("""
* place!=in; A [go] (home|back home). to: in / A [walk] on L.to. to: out
* place!=in B=yes; T [walk T] on L.to. to: out
* place=out; A [go] L.to (to look around|). to: town
* place=in dark!=yes; A [go] out L.to. to: out
* place=in dark!=yes B=yes; T [go T] out L.to. to: town
* place=in dark=yes; A [look] at the (moon|stars). to: in
""")
CLOSINGS = rows("""
* mood=sad B=yes; B [see] that A.name [be] sad and [hug] A.him. Then A [feel] (much|a little) better.
* mood=sad P=yes; P [come] to A.name. It [know] that A.he [be] sad, and it [stay] close.
* mood=sad; A [be] (sad|unhappy), but A.he [hope] for a better day. / It [have] not been a good day, and A
    [go] to bed early.
* wet=yes; A [be] still wet. A.he [put] on dry (clothes|socks and shoes) at home.
* place!=in kin!=adult; At the end of the day A [go] home and [tell] A.his (mother|father) everything.
* mood!=sad place!=in B=yes; T [walk T] home (hand in hand|together|with a song). They [be pl] (tired|happy),
    and it [have] been a (good|long) day.
* mood!=sad; A [smile] and [think] about the (good|long|lovely) day. / That night A [sleep] well and [dream]
    of the (blue|wide|green|golden) (sky|sea|hills). / It [have] been a (good|fine|lovely) day, and A [fall]
    asleep with a smile.
* mood=happy; A [be] so happy that A.he [sing] (aloud|a song|all evening). / What a (happy|lovely|fine) day! A
    [laugh] (aloud|with joy|).
* mood!=sad P=yes; In the evening A [sit] by the fire with A.his P.noun. A.he [be] happy.
* mood!=sad B=yes; T [be T] (happy|glad), and so the day [end].
""")
# "* name; needs; cast; beginning", then the variants "- cause > effect = what holds then". The variants share
# needs, cast and beginning, so that the cause alone tells the effect. The cast X=fruit draws the thing X from
# THINGS["fruit"]; swap=YZ adds the variant in which Y and Z have changed places.
EPISODES = read_episodes("""
* need; ; ;
  - A [be] (very|so|really) hungry. / A.his stomach [be] empty, for A.he [have] not eaten (for hours|all day).
    > A [eat] {food} and [be] not hungry any more. / So A [sit] down and [eat] {food}.
  - A [be] (very|so|really) thirsty. / A.his mouth [be] dry, for A.he [have] found no water. > A [drink]
    {drink} and [be] not thirsty any more. / So A [sit] down and [drink] {drink}.
  - A [be] (very|so|really) tired. / A.his legs [be pl] heavy, for A.he [have] played all day. > A [sleep] for
    an hour and [be] not tired any more. / So A [lie] down and [sleep] for a while.
  - A [be] (very|so|really) dirty. / A.his face [be] black, for A.he [have] played in the mud. > A [wash] with
    soap and [be] not dirty any more. / So A [take] some soap and [wash] for a while.
  - A [be] (quite|rather|really) ill. / A.his head [hurt], for A.he [have] been in the sun. > A [take] some
    medicine and [be] not ill any more. / So A [see] a doctor and [take] some medicine.
* fall; place=in; X=fragile Y=soft; A [climb] on a chair to reach a high shelf. / A [help] to clean the
    (table|shelf|room).
  - By accident A.he [drop] X.new. / X.new [slip] from A.his hands and [fall] to the floor. > It [break] into
    (many|small|a hundred) pieces. / There [be pl] sharp pieces everywhere. = mood=sad
  - By accident A.he [drop] Y.new. / Y.new [slip] from A.his hands and [fall] to the floor. > It [be] soft and
    [do] not break. / Nothing [be] broken, and A [laugh].
* rain; place!=in weather!=rain weather!=snow; ; (Soon|Then|Suddenly) (dark|grey|black) clouds [come pl], and
    it [begin] to rain.
  - A [have] no umbrella with A.him. / A [have] left A.his umbrella at home. > So A.he [get] (very|quite) wet.
    / The water [run] down A.his neck. = weather=rain mood=sad wet=yes
  - A [have] a (big|red|blue) umbrella with A.him. / A [have] brought A.his umbrella from home. > So A.he
    [stay] (quite|nice and) dry. / The water [cannot] touch A.him. = weather=rain
* heat; place!=in weather=cloud; ;
  - a cold wind [begin] to blow, and A.name [be] (much|far|) too cold. > A [put] on a thick scarf and [be]
    soon warm again. / A [run] up and down until A.he [be] warm. = weather=wind
  - The sun [come] out, and A.name [be] (much|far|) too hot. > A [take] off A.his coat and [be] soon cool
    again. / A [sit] in the shade until A.he [be] cool. = weather=sun
* find; ; X=small Y=container Z=container swap=YZ; A [see] Y.new and Z.new in (a|the) corner. / Near A.name
    [stand pl] Y.new and Z.new.
  - A [put|hide] A.his X.name in Y. > Later A [look] in Y and [find] X there. / (When|As soon as) A [need] X,
    A.he [take] it out of Y.
* seek; place!=in B=yes; Y=spot Z=spot swap=YZ; T [play T] hide and seek between Y.new and Z.new.
  - B [hide] behind Y. / B [run] and [hide] behind Y. > (Soon|At last) A [find] B.name behind Y. / A [look]
    behind Y, and there B.he [be].
* give; B=yes; X=toy swap=AB; T [talk T] about (games|toys|friends). / T [want T] to play.
  - A [have] X.new and [give] it to B.name. / A [bring] X.new and [hand] it to B.name. > Now B.name [have] X,
    and B.he [thank] A.name. / X now [belong] to B.name.
* count; B=yes; X=fruit; A [have] two X.many in A.his (bag|pocket|basket).
  - A [give] one of them to B.name. > Now A [have] only one X.name left. / There [be] still one X.name for
    A.name.
  - A [give] both of them to B.name. > Now A [have] no X.name left. / There [be] no X.name for A.name now.
* paint; ; X=furniture C=colour D=colour swap=CD; A [want] to paint X.new. / X.new [need] new paint, C or D.
  - A [find] some C paint and a brush. / A [choose] a pot of C paint. > Soon X [be] C (all over|). / After an
    hour X [look] C and bright.
* locked; ; X=box; A [see] X.new and [want] to look inside, but it [be] locked.
  - A [have] the (right|small|little) key in A.his pocket. / A [find] the key (in a corner|close by). > So A
    [open] X and [look] inside. / X [open] with a click. = mood=happy
  - A [have] lost the (right|small|little) key. / A [look] for the key, but it [be] gone. > So A [cannot] open
    X or look inside. / X [stay] shut. = mood=sad
* lift; ; X=load; A [want] to lift X.new. / A [try] to carry X.new away.
  - It [be] full of (stones|bricks|iron) and (very|so) heavy. > A [pull] and [pull], but A.he [cannot] lift
    it. / X [do] not move at all.
  - It [be] full of (feathers|straw|paper) and (very|so) light. > A [lift] it with one hand and [carry] it
    away. / X [be] easy to carry.
* reach; place=out weather!=snow; X=fruit; A [see] X.new in (a|the) (big|old|) tree. / There [be] X.new in a
    tree, and A [want] it.
  - It [hang] on a (very|) low branch. / The branch [be] (very|so) low. > A [pick] X and [eat] it. / A [take]
    X with one hand. = mood=happy
  - It [hang] on a (very|) high branch. / The branch [be] (very|so) high. > A [jump], but A.he [cannot] reach
    it. / X [hang] too far away from A.name.
* gate; P=yes place!=in; ; P [run] around near an open gate. / A [go] through a gate with P.
  - A [forget] to shut the gate. / A [leave] the gate open. > So P [run] away, and A [find] it an hour later.
    / A [have] to look for P for an hour.
  - A [shut] the gate (with care|at once). / A [tie] the gate with a rope. > So P [cannot] run away, and A
    [be] glad. / A [do] not have to look for P at all.
* bus; place=town; ; A [want] to take the bus home (, for it [be] late|).
  - A [walk] (very|far too) slowly and [stop] (often|many times). > The bus [have] left, and A [have] to walk
    home. / A [miss] the bus and [get] home late. = place=in mood=sad
  - A [run] (very fast|all the way) and [do] not stop (once|). > The bus [be] still there, and A [take] it
    home. / A [catch] the bus and [get] home early. = place=in
* snowman; place!=in weather=snow; ; A [make] a (big|tall|fat|little) snowman.
  - Then the sun [come] out, and it [grow] warm. > So the snowman [melt]. / Soon only (a hat and|) some water
    [be] left of the snowman. = weather=sun
  - It [stay] very cold, and more snow [fall]. > So the snowman [do] not melt. / The snowman [stand] there and
    [grow] even bigger.
* lamp; place=in; ; It [grow] dark, and A [want] to (read a book|draw a picture|write a letter).
  - A [light] (the lamp|a candle|the big lamp). / A [find] a lamp and [light] it. > Now A.he [can] see
    (very well|everything). / The room [be] bright now. = dark=yes
  - There [be] no (lamp|candle|light) in the room. / A [look] for a lamp, but there [be] none. > So A.he [can]
    see (nothing|nothing at all). / The room [stay] dark. = dark=yes
* race; kin=young place!=in; Y=landmark swap=AB; T [run T] a race to Y.new.
  - A [be] (very|) fast, but B.name [fall] over a stone. / A [run] like the wind, and B.name [be] slow. > So
    A.name [win] the race, and B.name [come] second. / A [reach] Y long before B.name.
* bake; place=in; X=baked; A [put] X.new in the oven.
  - A [watch] it (well|with care) and [take] it out in time. > X [be] golden and [smell] (good|sweet|lovely).
    / A [eat] a big piece of X. = mood=happy
  - A [forget] it and [leave] it there (too|much too) long. > X [be] black and [smell]
    (bad|of smoke|terrible). / A [cannot] eat one bit of X. = mood=sad
* boat; place=out weather!=snow; ; A [find] a pond and [put] A.his {hue} toy boat on the water.
  - There [be] a (big|small|) hole in the boat. > So the boat [fill] with water and [sink]. / Soon the boat
    [lie] under the water. = mood=sad
  - There [be] no hole in the boat (, and it [be] strong|). > So the boat [float] on the water. / Soon the
    boat [reach] the other side. = mood=happy
* kite; place=out weather!=rain weather!=wind weather!=snow; ; A [take] out A.his {hue} kite and [run] with
    it.
  - a (strong|fresh) wind [blow] (over the land|). / The wind [be] (strong|fresh). > The kite [fly] high up in
    the sky. / Soon the kite [be] above the trees. = weather=wind mood=happy
  - There [be] no wind at all. / The air [be] (quite|very) still. > The kite [fall] down on the ground. / Soon
    the kite [lie] on the grass.
* shop; place=town; X=goods; A [see] X.new in a shop and [want] to buy X.him.
  - A [have] (enough|a lot of) money in A.his pocket. > So A [buy] X and [carry] X.him out. / A [leave] the
    shop with X. = mood=happy
  - A [have] (no|too little) money in A.his pocket. > So A [cannot] buy X. / A [leave] the shop without X. =
    mood=sad
* fit; B=yes; X=fitted; B [bring] X.new for A.name. / B [give] A.name X.new.
  - X.he [be X] (much|far) too (small|big) for A.him. > So A [cannot] wear X. / A [put] X away and [be] sad. =
    mood=sad
  - X.he [be X] just (right|the right size) for A.him. > So A [can] wear X. / A [put] X on and [be] happy. =
    mood=happy
* puddle; place!=in weather!=snow wet!=yes; ; There [be] a (big|deep|wide) puddle on the path.
  - A [wear] high (rubber|red|green) boots and [jump] in. > A.his feet [stay pl] dry. / No water [touch] A.his
    feet.
  - A [wear] thin (summer|old|red) shoes and [jump] in. > A.his feet [get pl] wet. / The cold water [touch]
    A.his feet. = wet=yes
* noise; place!=in; Y=landmark; A [hear] a (strange|loud|deep) noise behind Y.new. / What [be] that noise
    behind Y?
  - It [be] only a (kitten|mouse|little bird|hen). > A [laugh] and [go] closer. / A [be] not afraid any more.
  - It [be] a big angry (dog|bull|goose|pig). > A [cry] and [run] away. / A [be] even more afraid now.
* mend; B=yes; X=mended; A.his X.name [be] broken. / A [break] A.his X.name.
  - B [take] some (glue|tools) and [mend] it. > Now X [be] (as good as new|whole again). / A [be] happy and
    [thank] B.name. = mood=happy
  - B [try] to help, but B.he [cannot] mend it. > Now X [be] (no good any more|only rubbish). / A [be] sad,
    and so [be] B.name. = mood=sad
* feed; P=yes; ; P [be] hungry. / P [look] at its dish and [wait] for food.
  - A [fill] its dish with food. / A [bring] it a big meal. > So P [eat] and [be] full. / P [fall] asleep with
    a full stomach.
  - A [forget] to fill its dish. / A [bring] it no food. > So P [eat] nothing and [be] sad. / P [go] away with
    an empty stomach.
* fishing; place=out weather!=snow; X=fish; A [sit] by (the|some deep) water (with a rod|with a long rod) and
    [fish].
  - Something [pull] hard on A.his line. > A [pull] back and [catch] X.new. / Soon A.his bucket [be] full. =
    mood=happy
  - Nothing [pull] on A.his line (all day|for hours). > A [give] up and [catch] nothing. / So A.his bucket
    [stay] empty. = mood=sad
* birthday; B=yes; ; It [be] A.name's birthday.
  - B [know] it and [buy] a (gift|cake). > A [get] a (lovely|big|wonderful) surprise. / A [thank] B.name and
    [jump] with joy. = mood=happy
  - B [forget] it and [buy] nothing. > A [get] no (gift|cake) at all. / A [wait] for B.name, but no cake
    [come]. = mood=sad
* road; place=out; Y=landmark Z=landmark; The left road [lead] to Y.new, and the right road [lead] to Z.new.
  - A [take] the left road. / A [turn] left. > Soon A.he [stand] in front of Y. / A [walk] and [walk] and
    [come] to Y.
  - A [take] the right road. / A [turn] right. > Soon A.he [stand] in front of Z. / A [walk] and [walk] and
    [come] to Z.
""")

CHOICE = re.compile(r"\(([^()]*)\)")
FIELD = re.compile(r"\b([A-Z])\b(?:\.([a-z]+))?|\{(\w+)\}|\[([\w|]+) ?(\w*)\]")
FACT = re.compile(r"(\w+)(!?)=(\w+)")
SENTENCE = re.compile(r"(?<=[.!?]) ")
GAP = re.compile(r" +(?=[ .,])")                           # what an empty choice leaves behind
ARTICLE = re.compile(r"\b([Aa]) (?=[aeiou])")


@dataclass
class Thing:
    name: str             # what it is called: "Anna", "her mother", "Rex", "dogs", "red"
    gender: str           # f, m, n (it), p (they): decides pronouns and agreement; w: a bare word
    look: str = ""        # adjective at its first mention
    noun: str = ""        # "dog"
    many: str = ""        # "dogs"
    kin: str = ""         # how a companion is introduced: "her brother Tom"


@cache
def conjugate(verb: str, past: bool, many: bool) -> str:
    if verb == "be":
        return ("were" if many else "was") if past else ("are" if many else "is")
    if past:
        return PAST.get(verb, verb + ("d" if verb.endswith("e") else "ed")).replace("_", " ")
    if many or verb in ("can", "cannot"):
        return verb
    if verb.endswith("y") and verb[-2] not in "aeou":
        return verb[:-1] + "ies"
    return "has" if verb == "have" else verb + ("es" if verb.endswith(("s", "sh", "ch", "x", "o")) else "s")


@cache
def facts(text: str) -> list:
    """"place=out weather!=rain" -> [("place", True, "out"), ("weather", False, "rain")]"""
    return [(key, negation == "", value) for key, negation, value in FACT.findall(text)]


@cache
def alternatives(templates: str) -> list:
    """Every alternative as its list of sentences."""
    return [SENTENCE.split(template) for template in templates.split(" / ")]


@cache
def antecedent(template: str) -> str:
    return next((slot for slot in "NO" if re.search(rf"\b{slot}\b", template)), "A")


class World:
    """A cast, a state, a random stream. `tell` puts templates into words, `apply` changes cast and state."""

    def __init__(self, rng: Random):
        self.rng, self.past, self.subject, self.focus = rng, rng.random() < 0.7, "", ""
        self.said, self.told = set(), set()                # nouns and templates that this story has used
        sex, weather = self.pick("fm"), self.pick(("sun", "sun", "wind", "cloud", "cloud", "snow"))
        a = Thing(self.pick(NAMES[sex]), sex)
        self.state = {"weather": weather}
        self.cast = {"A": a, "pl": Thing("", "p")}
        self.words = {"child": "girl" if sex == "f" else "boy", "sky": self.pick(SKY[weather].split()),
                      "time": self.pick(("morning", "afternoon", "day"))}
        self.apply("place=" + self.pick(("in", "in", "in", "out", "out", "out", "out", "town")))
        if rng.random() < 0.65:
            sex, age = self.pick("fm"), self.pick(("young", "young", "adult"))
            kin = f"{PRONOUNS[a.gender][2]} {self.pick(KIN[sex, age].split())}"
            name = self.pick([name for name in NAMES[sex] if name != a.name])
            b = Thing(kin, sex, kin=kin) if age == "adult" else Thing(name, sex, kin=f"{kin} {name}")
            self.cast.update(B=b, T=Thing(f"{a.name} and {b.name}", "p"))
            self.state.update(B="yes", kin=age)
        if rng.random() < 0.4:
            noun = self.pick(tuple(PETS))
            self.cast["P"] = Thing(self.pick(PETS[noun].split()), "n", self.pick(LOOKS["pet"]), noun)
            self.state["P"] = "yes"

    def pick(self, row):
        return row[int(self.rng.random() * len(row))]      # several times faster than rng.choice

    def meets(self, needs: str) -> bool:
        for key, wanted, value in facts(needs):
            if (self.state.get(key) == value) != wanted:
                return False
        return True

    def choose(self, table: list) -> tuple:
        """A row (needs, key, ...) that holds now and, if there still is one, was not told before."""
        possible = [row for row in table if self.meets(row[0])]
        row = self.pick([row for row in possible if row[1] not in self.told] or possible)
        self.told.add(row[1])
        return row

    def apply(self, sets: str):
        """Small keys ("weather=rain") change the state, capital ones ("X=fruit") cast such a thing."""
        for key, _, value in facts(sets):
            if key.isupper():
                self.cast[key] = self.draw(value)
            else:
                self.state[key] = value
            if key == "place":
                here = self.cast["L"].name if "L" in self.cast else ""
                self.cast["L"] = Thing(self.pick([place for place in PLACES[value] if place != here]), "w")

    def draw(self, kind: str, many: bool = False) -> Thing:
        noun = self.pick([noun for noun in THINGS[kind] if noun not in self.said] or THINGS[kind])
        self.said.add(noun)
        look, plural = self.pick(LOOKS.get(kind, LOOKS["thing"])), PLURALS.get(noun, noun + "s")
        if noun.endswith("+"):
            return Thing(noun[:-1], "p", look, noun[:-1])
        gender = "w" if kind == "colour" else "p" if many else "n"
        return Thing(plural if many else noun, gender, look, noun, plural)

    def tell(self, templates: str, link: str = "") -> list:
        """One of the alternatives, as a list of finished sentences; a link ("Later") may open the first."""
        sentences = self.pick(alternatives(templates)) if templates else []
        if link and sentences and sentences[0][1] in " .":     # it begins with a slot: A, X.new
            sentences = [f"{link} {sentences[0]}", *sentences[1:]]
        return [self.say(sentence) for sentence in sentences]

    def say(self, sentence: str) -> str:
        self.subject = ""
        if "(" in sentence:
            sentence = CHOICE.sub(lambda m: self.pick(m[1].split("|")), sentence)
        text = GAP.sub("", FIELD.sub(self.fill, sentence))
        self.focus = self.subject                          # the next sentence may call it he, she, it or they
        return ARTICLE.sub(r"\1n ", text[0].upper() + text[1:])

    def fill(self, m: re.Match) -> str:
        slot, form, word, verb, subject = m.groups()
        if slot:
            return self.name(slot, form or "")
        if word:
            return self.pick(WORDS[word]) if word in WORDS else self.words[word]
        if verb == "move":
            verb = "wait|rest|sleep|" + MOVES.get(self.cast["N"].noun, "run")
        return conjugate(self.pick(verb.split("|")), self.past, self.cast[subject or "A"].gender == "p")

    def name(self, slot: str, form: str) -> str:
        """How a cast member is called here; the subject of the last sentence may become a pronoun."""
        thing = self.cast[slot]
        again = slot == self.focus and not self.subject
        if slot in "ABTP" and form in ("", "he"):
            self.subject = self.subject or slot
        if form in FORMS:
            return PRONOUNS[thing.gender][FORMS.index(form)]
        if form == "to":                                   # in the park -> to the park
            return "to " + thing.name.partition(" ")[2]
        if form == "new":
            return f"{'some' if thing.gender == 'p' else 'a'} {thing.look} {thing.name}"
        if form:
            return getattr(thing, form)
        if slot not in "ABTP":
            return thing.name if thing.gender == "w" else "the " + thing.name
        if again and self.rng.random() < 0.7:
            return PRONOUNS[thing.gender][0]
        return "the " + thing.noun if slot == "P" and self.rng.random() < 0.5 else thing.name

    def scene(self) -> list:
        lines = self.tell(self.choose(SCENES)[1])
        return lines + (self.tell(self.choose(PETS_COME)[1]) if "P" in self.cast else [])

    def tell_about(self, template: str, many: bool, agree: Thing = None) -> list:
        """A template about A, N (animals) or O (objects), and Q that agrees; M and K just stand by."""
        for slot, kind in (("N", "animal"), ("O", "object"), ("M", "landmark"), ("K", "object")):
            self.cast[slot] = self.draw(kind, many if slot in "NO" else self.rng.random() < 0.5)
        self.cast["Q"] = agree or self.cast[antecedent(template)]
        return self.tell(template)

    def travel(self) -> list:
        template, place = self.choose(TRAVELS)[1].split(" to: ")
        self.apply("place=" + place)                       # first, for {L} to be the new place
        return self.tell(template)

    def episode(self) -> list:
        row = self.choose(EPISODES)
        variant = self.pick(row[4])
        lines = self.cause(row, variant, self.pick(LINKS)) + self.tell(variant[1])
        self.apply(variant[2])
        return lines

    def cause(self, episode: tuple, variant: tuple, link: str = "") -> list:
        self.apply(episode[2])
        beginning = self.tell(episode[3], link)
        return beginning + self.tell(variant[0], "" if beginning else link)


def story(seed: int, sentences: int = 0) -> str:
    """One story; `sentences` is the length aimed at, 0 for one drawn between 9 and 13."""
    world = World(Random(seed))
    goal = sentences or 9 + int(world.rng.random() * 5)
    lines = (world.tell(world.choose(OPENINGS)[1]) if world.rng.random() < 0.75 else []) + world.scene()
    while len(lines) < goal - 2:
        part = world.rng.random()
        if part < 0.3:
            lines += world.tell_about(world.choose(FILLERS)[1], part < 0.15)
        else:
            lines += world.travel() if part < 0.4 else world.episode()
    return " ".join(lines + world.tell(world.choose(CLOSINGS)[1]))


def text(first_seed: int, count: int):
    """The stories of `count` seeds in a row, one after the other."""
    return (story(seed) for seed in range(first_seed, first_seed + count))


@lru_cache(maxsize=1)
def words() -> list:
    """The content words of the vocabulary, sorted, in lower case: no names, no function words."""
    names = set(NAMES["f"] + NAMES["m"] + " ".join(PETS.values()).split())
    found = {word for one in text(0, 4000) for word in re.findall(r"[A-Za-z]+", one)} - names
    return sorted({word.lower() for word in found} - STOP)


def world_where(needs: str, seed: str) -> World:
    """The first world of a fixed sequence in which `needs` holds."""
    return next(world for i in naturals() if (world := World(Random(f"{seed} {i}"))).meets(needs))


def twins_about(table: dict, seed: str) -> list:
    """Antecedent and agreeing form set apart: girl and she or he, boy and he or she; one or many likewise."""
    rng = Random(seed)
    needs, template = rng.choice(table)
    kinds = [Thing("", "n"), Thing("", "p")]
    if antecedent(template) == "A":
        kinds = [Thing(rng.choice(NAMES[sex]), sex) for sex in "fm"]

    def one(subject: int, form: int) -> str:
        world = world_where(needs, seed)
        if set(re.findall(r"\[(\w+) Q\]", template)) - {"be"}:
            world.past = False                             # the past tense shows number in "be" alone
        if antecedent(template) == "A":
            world.cast["A"] = kinds[subject]
        return " ".join(world.tell_about(template, subject == 1, kinds[form]))
    return [(one(i, i), one(i, 1 - i)) for i in (0, 1)]


def ending_twins(same_episode: bool, seed: str) -> list:
    """Two beginnings in one world that exchange their endings: sister variants, or two unrelated episodes."""
    rng = Random(seed)
    episode = rng.choice(EPISODES)
    needs = episode[0] if same_episode else ""             # unrelated ones: whatever can happen in some world
    if same_episode:
        chosen = [(episode, variant) for variant in rng.sample(episode[4], 2)]
    else:
        possible = [row for row in EPISODES if world_where(needs, seed).meets(row[0])]
        chosen = [(row, rng.choice(row[4])) for row in rng.sample(possible, 2)]
    told = []
    for episode, variant in chosen:
        world = world_where(needs, seed)                   # the same world anew: same cast, same tense
        beginning = world.scene() + world.cause(episode, variant)
        told.append((" ".join(beginning), " ".join(world.tell(variant[1]))))
    return [(" ".join(here), f"{here[0]} {there[1]}") for here, there in (told, told[::-1])]


def word_order_twins(seed: str) -> list:
    """A determiner or preposition trades places with the word after it, in two sentences."""
    rng, made = Random(seed), []
    while len(made) < 2:
        right = rng.choice(SENTENCE.split(story(rng.randrange(10 ** 9))))
        row = right[:-1].split()
        places = [i for i in range(len(row) - 1) if row[i].lower() in FIRST_WORDS and row[i + 1].isalpha()]
        if len(row) >= 5 and places:
            i = rng.choice(places)
            row[i], row[i + 1] = row[i + 1], row[i].lower()
            wrong = " ".join(row)
            made.append((right, wrong[0].upper() + wrong[1:] + right[-1]))
    return made


def pairs(kind: str, count: int, seed: int = 0) -> list:
    """`count` (right, wrong) texts. Pairs 2i and 2i + 1 are twins: what is wrong in one is right in the
    other, so length and words alone score one half. (In word_order both texts have the same words.)"""
    makers = {"agreement": partial(twins_about, AGREEMENT), "pronoun": partial(twins_about, PRONOUN),
              "word_order": word_order_twins,
              "ending": partial(ending_twins, True), "topic": partial(ending_twins, False)}
    if kind not in makers:
        raise ValueError(f"no kind of pairs is called {kind!r}; choose one of {', '.join(makers)}")
    return [pair for i in range((count + 1) // 2) for pair in makers[kind](f"{kind} {seed} {i}")][:count]


@dataclass(frozen=True)
class StoriesConfig:
    count: int = 5  # stories or pairs to print
    seed: int = 0  # of the first story, or of the pairs
    pairs: str | None = None  # print pairs of right and wrong instead: agreement | pronoun | word_order | ending | topic
    out: str | None = None  # write stories to this file instead, one a line
    megabytes: float = 1.0  # size of that file in 10^6 bytes
    FILES, NEEDS = {"out": "the stories"}, {"megabytes": "out"}
    RANGES = {"count": (1, config.MOST), "megabytes": (config.ABOVE_0, 1e6)}


def main(argv=None):
    options = config.load(StoriesConfig, argv)
    if options.out:
        left, seed = int(options.megabytes * 1e6), options.seed
        with open(options.out, "w", encoding="ascii") as file:
            while left > 0:
                left -= file.write(story(seed) + "\n")
                seed += 1
    elif options.pairs:
        for right, wrong in pairs(options.pairs, options.count, options.seed):
            print(f"right: {right}\nwrong: {wrong}\n")
    else:
        print("\n\n".join(text(options.seed, options.count)))


if __name__ == "__main__":
    config.command(main)
